"""Option groups: one module a concern, each `add_arguments(parser)` beside the frozen dataclass that it fills."""
