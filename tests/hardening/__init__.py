"""The attack on the tool: hostile files, kills, full disks and long runs.

`mutate` damages bytes, `attempt` runs a command under limits and judges it, `interrupting` kills commands at random
moments. The seed of all of it is `--hardening-seed N`; the long tests are behind `-m attack`.
"""
