"""Parts of all Triton kernels: launch, interpretation, facts about devices and packages."""
