"""The peers, as their documentation shows them, and the two ends of the scale.

Each `app` answers `/stream?count=&pad=`, so many events as fast as it goes, and those that the other benchmarks ask,
`/ticks?interval=`: an event with its time, each `interval` seconds. `prepared` is the floor of a broadcast.
"""
