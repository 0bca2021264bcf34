"""The commands of `ddpo-fast`.

train, train_reward, plan, sample,    one module each, whose `run` is the command; `ddpo_fast/cli.py` calls it
recipes, info
options                              the options of all of them, read without torch
early_checks                         what `train` checks before any weight is loaded
recorded_run                         the options that an earlier run recorded, and whether they may be used
before_after                         the images of the same noise before and after training
library_warnings                     the warnings of other packages that a command leaves out
"""
