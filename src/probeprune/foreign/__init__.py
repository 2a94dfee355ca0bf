"""Text and files of others: read within limits, shown as they are."""
