"""The study: what ways of fine-tuning do with small training sets, measured for sceptics.

    a3fta study --folder somewhere          # printed to handwritten digits
    a3fta study --model ./sd15 --images ./photos --folder somewhere

The plan stands in benchmarks/study/PLAN.md, results in benchmarks/STUDY.md. Modules, bottom first:
glyphs, bases, features, metrics, methods; plan, subject (what is studied), statistics, table (the
CSV); pairs and pretrained (subjects), training, views (where runs are compared); figures,
hypotheses; run (one line), report; work (what is missing, processes); conduct.
"""
