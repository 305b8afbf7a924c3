"""The broker: one detached actor a namespace, around the ledger.

actor.py        what clients ask: calls and long polls      liveness.py  what Ray says of clients
replicas.py     a job's changes, kept in vaults, and read   exporter.py  figures for Prometheus
                again by a broker that begins
durability.py   the same, kept in a durable store
"""
