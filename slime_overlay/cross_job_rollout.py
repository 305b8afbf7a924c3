"""The rollout job of slime, beside train.py: takes slime's arguments and generates what the train job demands.

python cross_job_rollout.py --enable-cross-job-communication --job-id NAME --cross-job-role rollout ARGUMENTS
python train.py             --enable-cross-job-communication --job-id NAME --cross-job-role train   ARGUMENTS
"""

from slime.cross_job.client.jobs import run

if __name__ == "__main__":
    from slime.utils.arguments import parse_args

    from slime.cross_job.adapter.rollout_driver import main

    run(lambda: main(parse_args()))
