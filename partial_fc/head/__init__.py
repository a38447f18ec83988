"""The partitioned head: class centers over all ranks, any margin, streaming softmax, fused update."""
