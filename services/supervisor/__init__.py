"""Both services on this machine, as two child processes: what `rag up` runs.

``pair`` starts, watches and stops them, ``child`` is one process, ``tether`` ties its life to ours, ``reporter`` says
what happens, ``address`` checks the ports.
"""
