"""What a training run takes and shows beside its steps: memory, records, measurements."""
