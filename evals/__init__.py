"""Tasks, answer checking, accuracy with intervals, and the runner that measures a student or a teacher."""
