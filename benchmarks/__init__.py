"""What a claim of speed rests on: the rival beside ours, in one run, with the ratio."""
