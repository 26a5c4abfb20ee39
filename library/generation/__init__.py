"""Pictures.

prompts             prompt files and their options
"""
