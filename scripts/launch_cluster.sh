#!/usr/bin/env bash
# A Ray cluster for slime's two jobs: local, compose, or what to run on bare metal and on Slurm; see --help
exec python3 "$(dirname "${BASH_SOURCE[0]}")/launch_cluster.py" "$@"
