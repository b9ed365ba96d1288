"""What an answer is: outputs merged, read, shaped and sent."""
