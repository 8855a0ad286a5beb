"""One file per method: a recipe over the slots of the step."""
