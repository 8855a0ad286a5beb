"""What writes the student's rollouts, one file each; chosen by `student.rollouts.type`."""
