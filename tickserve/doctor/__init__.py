"""What `tickserve doctor` looks at: what is installed, what the kernel allows, threads, GPUs, and the optimisations."""
