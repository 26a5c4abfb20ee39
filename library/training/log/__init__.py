"""What a run says.

metrics             speed, average loss, metrics.jsonl, TensorBoard, the bar
startup             the resolved plan, before training
final_block         the figures at the end, and the case log
quarantine          samples that could not be used
shown_data          captions that are cut, and --debug_dataset
"""
