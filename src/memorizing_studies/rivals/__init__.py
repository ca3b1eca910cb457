"""What a memory is measured against."""
