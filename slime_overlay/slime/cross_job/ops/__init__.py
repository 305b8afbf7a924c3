"""For those who run it: the command line, the live view, doctor, traces, reports. Nothing else of the package uses it.

Needs typer and rich, and for the live view aiohttp (which Ray's dashboard brings).
"""
