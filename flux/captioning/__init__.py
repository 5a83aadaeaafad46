"""What turns Florence-2 into a captioner: its tokenizer, its tasks, and the preparation of pictures."""
