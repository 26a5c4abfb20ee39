"""Option groups: one module for each concern, `add_arguments(parser)` beside the frozen dataclass that it fills.

parser              the parser that scripts share, and the types that flags convert to
options             the groups that every training script has, together
model, data, caches, optimization, run      the groups
config_file         --config_file and --output_config
dataset_config      --dataset_config: several data sets, each of several subsets
read_config         a .toml or .json file as a table of keys and values
"""
