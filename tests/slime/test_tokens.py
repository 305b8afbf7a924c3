"""`show --tokenizer`: the tokens of a sample as the texts that slime's tokenizer reads in them."""

import pytest
from transformers import AutoTokenizer

from slime.cross_job.errors import BadInput
from slime.cross_job.ops.export import read_tokens
from tests.slime.single_job import Folders

pytestmark = pytest.mark.ci


def found(**values):
    return {"samples": [{"index": 3, "part": 0, "values": values}]}


def test_prompt_and_response_are_told_apart(tmp_path):
    folders = Folders(tmp_path)
    folders.prepare()
    ids = AutoTokenizer.from_pretrained(folders.model).encode("1+2=3")
    read = read_tokens(str(folders.model), found(tokens=ids, response_lengths=1))[3]
    assert (read["prompt_text"] + read["response_text"]).replace(" ", "").endswith("1+2=3")
    assert read["response_text"].strip() == "3"
    assert read_tokens(str(folders.model), found(tokens=ids))[3].keys() == {"response_text"}


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(BadInput, match="cannot be read as a tokenizer"):
        read_tokens(str(tmp_path), found(tokens=[1]))
