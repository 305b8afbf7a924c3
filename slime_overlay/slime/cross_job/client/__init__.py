"""What runs in the processes of users' jobs.

producer.py, consumer.py   the two roles              connection.py  calls, deadlines, broker and vaults by name
session.py                 attached, heard, parts     weights.py     weights as a value of the job
placement.py               what Ray has no place for  shutdown.py    SIGTERM as a wish
jobs.py                    how a script ends          cluster_watch.py  the Ray cluster is gone
"""
