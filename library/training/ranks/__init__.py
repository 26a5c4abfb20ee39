"""What the processes of a run tell each other.

rank_watch          beside their collectives: a signal to stop, and how far each process is
agreement           before the first step: that all are about to train the same
main_process        what the main process does for all of them
"""
