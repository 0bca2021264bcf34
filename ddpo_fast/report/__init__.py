"""A page about one or more runs, in one file that opens without a network. Nothing here imports torch.

run_records          what a run's folder says: settings, and metrics by epoch and update
axes, curves         charts of them, as plotly draws them
prompts              rewards by prompt
remarks              what is unusual about a run, in words, and which option helps
images               sampled images, embedded
overview             a run in a sentence, and its main figures
settings             settings that are not defaults, or not the same in all runs
page                 the page itself, from page.html, page.css and page.js
serve                the page of a run that goes on, on this machine only
"""
