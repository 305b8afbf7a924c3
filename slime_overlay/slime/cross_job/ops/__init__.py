"""For those who run it: the command line, the live view, doctor, traces, reports. Nothing else of the package uses it.

Needs typer and rich, and for the live view aiohttp (which Ray's dashboard brings).

main.py, app.py, cli.py, steer.py, export.py   the command line: its entry, what all commands share, the commands
viewer.py, feed.py    reads a broker and attaches nothing; what is new there, for many who look
web.py, access.py, page.py, page/   the live view: server, tokens, page
top.py, text.py       the terminal's view; figures and texts for people
doctor/, report.py, traces.py
"""
