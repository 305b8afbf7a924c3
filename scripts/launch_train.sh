#!/usr/bin/env bash
# Submits the train job of an experiment to a Ray cluster: scripts/launch_train.sh --help
exec python3 "$(dirname "${BASH_SOURCE[0]}")/launch.py" train "$@"
