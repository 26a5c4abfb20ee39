"""Training states, from which a run goes on exactly.

states              when a state is due, what goes into it, and taking one up
writer              writing states while training goes on
files               a state on disk: its files, and the manifest that says that it is whole
tree                nested state dicts as tensors and JSON
tensor_rows         weights and optimizer state by parameter name, in ranges of rows
choice              the states of an output folder: which resumes, which may go
lineage             which start wrote something, and what that start goes on from
branch              an output folder holds one branch: what a start does not go on from is moved aside
resume              whether a state fits the run that takes it up
run_lock            one run at a time in an output folder
names               what files are called
retention           how many earlier ones are kept
"""
