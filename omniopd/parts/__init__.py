"""Parts of methods, one file each: see `omniopd.part`."""
