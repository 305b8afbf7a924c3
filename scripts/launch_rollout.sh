#!/usr/bin/env bash
# Submits the rollout job of an experiment to a Ray cluster: scripts/launch_rollout.sh --help
exec python3 "$(dirname "${BASH_SOURCE[0]}")/launch.py" rollout "$@"
