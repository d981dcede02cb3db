"""What a run is asked for.

`spec` joins the groups of `groups` to a `RunSpec`; `setting` and `checks` are what their fields are
declared with, and `spec_file` reads them from TOML. `selection` and `targets` turn what was asked into
positions of samples and into what adjoint mode carries backwards. Nothing here needs torch.
"""
