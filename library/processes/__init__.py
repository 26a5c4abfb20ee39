"""Several processes on one or several machines: how they find each other, start together and end together.

launch              one process for each device, by torchrun
environment         what launchers leave in the environment: followed, overridden with a line, or refused
gathering           the processes wait for each other, and say for whom
rendezvous          machines find each other, and compare versions and settings
machine_watch       machines send heartbeats, and end when another machine has failed
failures            why a run ended: which failure came first
versions            what must be the same on all machines: libraries and code
network_interface   which address and interface leads to another machine
"""
