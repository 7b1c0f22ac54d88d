"""The page of one run."""

from ssl_dist.report import gallery, health, scores, settings
from ssl_dist.report.charts import charts, overlaid
from ssl_dist.report.frame import document, navigation, notes, section
from ssl_dist.report.markup import Html, element, with_code
from ssl_dist.report.run import Run


def of_run(run: Run) -> str:
    """The whole document."""
    judged = health.judge(run)
    return document(
        f"{run.name}: {run.title}",
        [
            element("h1", run.title),
            element("p", *_subtitle(run), class_="faint"),
            notes(run, "title"),
            navigation(),
            health.key_numbers(run, judged),
            section("health", "Health", health.verdicts_of(run, judged)),
            section("results", "Results", notes(run, "results"), scores.beside_published(run)),
            section("curves", "Curves", notes(run, "curves"), charts(run)),
            section("views", "Views", gallery.views([run])),
            section("pictures", "Pictures", notes(run, "pictures"), gallery.figures([run])),
            _evaluations(run),
            section("config", "Config", settings.keys(run), settings.starts(run)),
        ],
    )


def _evaluations(run: Run) -> Html | None:
    """The trainings of probes and fine-tunings, where there are some."""
    if not run.evaluations and "evaluations" not in run.notes:
        return None
    words = "What `probe` and `finetune` trained on this run's backbone, in RUN/evaluations: each is a run of its own."
    lines = [element("p", with_code(words)), notes(run, "evaluations"), overlaid(run.evaluations, ["loss", "accuracy"])]
    return section("evaluations", "Trainings of evaluators", *lines)


def _subtitle(run: Run) -> list[object]:
    step, total = run.step, run.total_steps
    reached = "no step yet" if step is None else f"step {step:,}" + (f" of {total:,}" if total else "")
    parts: list[object] = [run.name, f" · {reached} · seed {run.config.seed}"]
    if run.checkpoint and run.digest:
        digest = element("code", run.digest[:16] + "…", title=run.digest)
        parts += [f" · checkpoint {run.checkpoint}, SHA-256 ", digest]
    return [*parts, element("br"), str(run.folder)]
