"""slime's side: the only room that imports slime.

hooks.py            what the patched lines call       arguments.py      what goes together, and what does not
rollout_driver.py   the rollout job's loop            train_driver.py   the train job's side
gateway.py          stands for slime's rollout manager in the train job
train_group.py      weight updates of the training actors
training_data.py    samples become Arrow, and training data again; boxes.py, dp_split.py: one part for each DP rank
conversion.py       training data as samples, and back by slime's own code
data_source.py      where the prompts stand           handshake.py      what both jobs must agree on
engine_weights.py, weight_folders.py, update_groups.py, ports.py   engines: whose weights, folders, groups, ports
replay.py, debug_files.py   recordings                tap.py            a single job that others read
tracking.py         wandb and TensorBoard
"""
