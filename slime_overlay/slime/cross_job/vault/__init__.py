"""Vaults: one actor a node, which owns the payloads that are published there.

protocol.py  what clients ask       actor.py    puts, gets, frees
durable.py   a durable store        preview.py  samples, for people
"""
