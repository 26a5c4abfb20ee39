"""Several processes on one or several machines: they meet, start together and end together.

launch              one process for each device, by torchrun
rendezvous          machines find each other, and find out whether they go together
machine_watch       each machine says that it is there, and hears when another has failed
failures            why a run ended: which failure came first
versions            what must be the same on all machines: libraries and code
network_interface   which address and interface leads to another machine
"""
