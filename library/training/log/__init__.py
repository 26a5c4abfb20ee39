"""What a run says.

metrics             speed, average loss, metrics.jsonl, TensorBoard, the bar
appended_lines      a file that grows by lines and never ends a run
tensorboard         TensorBoard's events, which never end a run either
startup             the resolved plan, before training
final_block         the figures at the end, and the case log
quarantine          samples that could not be used
shown_data          captions that are cut, and --debug_dataset
"""
