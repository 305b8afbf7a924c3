"""The names of the original proposal, on top of the same broker (data_broker.py) and stores (communicators.py), where
values lie as encoding.py says."""
