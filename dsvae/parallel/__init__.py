"""The processes of a run: they meet, agree, watch each other and stop together. Needs
torch.distributed alone."""
