"""What the teacher says of the next token, position by position: one file per kind of target (`omniopd.types.Target`)."""
