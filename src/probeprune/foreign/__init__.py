"""What is not ours: text and files, read within limits and shown as they are; libraries that may lack."""
