"""Other engines that `ptkit serve --engine` starts: one module or package for each."""
