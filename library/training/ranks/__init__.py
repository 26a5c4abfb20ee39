"""What the processes of a run tell each other.

rank_watch          beside their collectives: a signal to stop, how far each process is, why one has ended
rank_failure        the failure of one process as the others are told it, and work in which all fail together
agreement           before the first step: that all are about to train the same
main_process        what the main process does for all of them
"""
