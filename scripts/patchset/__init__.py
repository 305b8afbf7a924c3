"""The patch set of slime cross-job: applied to a checkout of slime, taken out, ported, exported.

Needs Python 3.10 and git, nothing else. The user's index, commits and object store are never written to.
"""
