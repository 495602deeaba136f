"""The Hilbert curve written out plainly (`base`), and the Triton kernel that moves rows into its order (`triton`)."""
