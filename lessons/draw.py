"""The figures of the lessons, in their order. Each function draws what a lesson has computed and returns the figure."""

from textwrap import fill

import matplotlib.pyplot as plt
import torch

BLUE, ORANGE, GREEN, RED, GREY = "tab:blue", "tab:orange", "tab:green", "tab:red", "0.6"
plt.rcParams.update({"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False})


def panels(rows, columns, width=8.6, height=3.6, **options):
    return plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **options)


def image(ax, pixels, title="", **options):
    """A picture without axes; grey unless told."""
    ax.imshow(pixels, **{"cmap": "gray", "interpolation": "nearest", **options})
    ax.set_title(title)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def label(ax, x, y, text, color, **options):
    """Text beside a curve, in its colour, instead of a legend."""
    ax.annotate(text, (x, y), xytext=(6, 0), textcoords="offset points", color=color, va="center", **options)


def apart(values, gap):
    """Heights for labels beside these values, at least `gap` from each other"""
    heights, order = list(values), sorted(range(len(values)), key=lambda i: values[i])
    for lower, upper in zip(order, order[1:]):
        heights[upper] = max(heights[upper], heights[lower] + gap)
    return heights


def decimal_ticks(axis, ticks):
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_ticks([], minor=True)


# ---- 01 ---------------------------------------------------------------------------------------------------------


def threshold(grid, costs, minima, sigma):
    """costs {z: (G,)} with their minima, and σ (G,) over the same grid"""
    figure, (left, right) = panels(1, 2)
    for (z, cost), color in zip(costs.items(), (BLUE, ORANGE)):
        left.plot(grid, cost, color=color)
        lowest = cost[(grid - minima[z]).abs().argmin()]
        left.plot(minima[z], lowest, "o", color=color)
        label(left, minima[z], lowest - 0.25, f"z = {z}: lowest at {minima[z]:.1f}", color)
    left.set(xlabel="s", ylim=(-0.4, 4), title="½ (s − z)² + λ|s| with λ = 1")
    right.plot(grid, grid, ":", color=GREY)
    right.plot(grid, sigma, color="black")
    label(right, -1.9, -2.5, "no threshold: σ(z) = z", GREY)
    right.annotate("from −λ to λ:\nexactly 0", (0.3, 0), (-2.6, 1.2), arrowprops={"arrowstyle": "->"})
    right.set(xlabel="z", title="the soft threshold σ(z)")
    return figure


def condition(codes, gradient, lam):
    figure, ax = panels(1, 1, height=3.8)
    zero = codes == 0
    ax.axhspan(-lam, lam, color="0.93")
    ax.plot(codes[zero], gradient[zero], ".", color=GREY)
    ax.plot(codes[~zero], gradient[~zero], "o", color=BLUE, markersize=4)
    for side, sign in ((lam, "λ"), (-lam, "−λ")):
        ax.axhline(side, color="black", lw=0.8)
        ax.text(1.0, side, f" {sign}", transform=ax.get_yaxis_transform(), va="center")
    width = codes.abs().max().item()
    ax.text(0.05 * width, 0.3 * lam, "not used: gradient\nanywhere from −λ to λ", color="0.4")
    ax.text(0.4 * width, -0.85 * lam, "used, s > 0: gradient exactly −λ", color=BLUE)
    ax.text(-0.95 * width, 0.75 * lam, "used, s < 0: gradient exactly λ", color=BLUE)
    ax.set(xlabel="coefficient $s_m$ at the minimum", ylabel="gradient $g_m$", ylim=(-1.3 * lam, 1.3 * lam))
    return figure


def valley(surface, box, paths, minimum):
    """The objective as contours over two coefficients, and the path {name: (steps, 2)} of each method"""
    figure, axes = panels(1, 2, height=4.9, sharey=True)
    levels = surface.min() + torch.logspace(-3.2, 0.7, 18) * (surface.max() - surface.min()) / 5
    for ax, (name, path), color in zip(axes, paths.items(), (BLUE, ORANGE)):
        ax.contour(surface, levels=levels, extent=box, colors="0.75", linewidths=0.8)
        ax.plot(*path.T, ".-", color=color, lw=1, markersize=5)
        ax.plot(*path[0], "s", color="black")
        ax.annotate("start", path[0], (4, 8), textcoords="offset points")
        ax.annotate(f"step {len(path) - 1}", path[-1], (14, 12), textcoords="offset points", color=color)
        ax.plot(*minimum, "*", color=RED, markersize=13, zorder=3)
        ax.set(xlabel="coefficient of atom 1", title=name)
        ax.set_aspect("equal")
    axes[0].set_ylabel("coefficient of atom 2")
    axes[0].annotate("minimum", minimum, (0, -18), textcoords="offset points", color=RED, ha="center")
    return figure


def bounds(curves, limits):
    """Distance to the minimum after each step, {name: (steps,)}, and what it never exceeds"""
    formulas = {"ISTA": r"$L\,\Vert S^\star\Vert^2 / 2k$", "FISTA": r"$2L\,\Vert S^\star\Vert^2 / (k+1)^2$"}
    figure, axes = panels(1, 2, height=3.8, sharey=True)
    for ax, name, color in zip(axes, curves, (BLUE, ORANGE)):
        k = torch.arange(1, len(curves[name]) + 1)
        ax.plot(k, curves[name], color=color, lw=2)
        ax.plot(k, limits[name], "--", color="black", lw=1)
        ax.fill_between(k, limits[name], 1e4, color="0.9")
        ax.text(0.95, 0.93, f"proved: never above\n{formulas[name]}", transform=ax.transAxes, ha="right", va="top")
        label(ax, 2, curves[name][1] / 40, f"what {name} did", color)
        ax.set(xscale="log", yscale="log", ylim=(1e-7, 1e3), xlabel="step k", title=name)
    axes[0].set_ylabel("above the minimum, relative")
    return figure


def path(shares, codes, planted, counts, errors, noise, marks):
    """One signal's coefficients (λ, M) along λ, and the error of all signals by the number of atoms; marks {i: text}"""
    figure, (left, right) = panels(1, 2, height=4)
    for values, truth in zip(codes.T, planted):
        if truth:
            (line,) = left.plot(shares, values, lw=2, zorder=2)
            left.plot(shares[-1], truth, "<", color=line.get_color(), clip_on=False)
        elif values.any():
            left.plot(shares, values, color="0.75", lw=0.8, zorder=1)
    left.set(xscale="log", xlim=(1, shares[-1]), xlabel="λ / largest λ", ylabel="coefficient")
    left.set_title("one signal: its 5 atoms (coloured),\nother atoms (grey), the truth (◂)")
    decimal_ticks(left.xaxis, [1, 0.1, 0.01, 0.001])
    right.plot(counts, [100 * error for error in errors], ".-", color=BLUE)
    for i, text in marks.items():
        label(right, counts[i], 130 * errors[i], text, BLUE)
    right.axhline(100 * noise, color=GREY, ls=":")
    right.text(0.55, 55 * noise, "share of noise in the signals", color="0.4")
    right.set(xscale="log", yscale="log", xlim=(0.5, 80), xlabel="atoms used per signal")
    right.set_title("error of all signals, %")
    decimal_ticks(right.xaxis, [1, 2, 5, 10, 20, 64])
    decimal_ticks(right.yaxis, [0.01, 0.1, 1, 10, 100])
    return figure


def patches(picture, patch_list, codes, atoms, side, places):
    """Patches of a picture (n, C), the places in order of rows, as sums of five atoms: codes (n, M)"""
    figure = plt.figure(figsize=(9.2, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 7))
    ax = left.subplots()
    image(ax, picture, "a picture")
    for place, color in zip(places, (RED, GREEN, BLUE)):
        y, x = (side * i - 0.5 for i in divmod(place, picture.shape[1] // side))
        ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, color=color, lw=2))
    grid = right.subplots(len(patch_list), 7)
    for row, patch, s, color in zip(grid, patch_list, codes, (RED, GREEN, BLUE)):
        best = s.abs().topk(5).indices
        scale = patch.abs().max()
        image(row[0], patch.view(side, side), "patch", vmin=-scale, vmax=scale)
        row[0].spines[:].set(visible=True, color=color, lw=2)
        for i, (ax, m) in enumerate(zip(row[1:6], best)):
            size = atoms[m].abs().max()
            sign = ("−" if s[m] < 0 else "+") if i else ("≈ −" if s[m] < 0 else "≈")
            image(ax, atoms[m].view(side, side), f"{sign} {s[m].abs():.2f} ×", vmin=-size, vmax=size)
        image(row[6], (s @ atoms).view(side, side), "= sum", vmin=-scale, vmax=scale)
    return figure


def wall(atoms, side, columns):
    """Atoms (n, side²) beside each other"""
    figure, axes = panels(len(atoms) // columns, columns, height=8.6 * len(atoms) / columns**2)
    for ax, atom in zip(axes.flat, atoms):
        size = atom.abs().max()
        image(ax, atom.view(side, side), vmin=-size, vmax=size)
    return figure


def coded(picture, approximations, side):
    """A picture beside what few atoms make of its patches: {title: (patches, side²)}"""
    figure, axes = panels(1, 1 + len(approximations), height=3.2)
    image(axes[0], picture, "the picture", vmin=0, vmax=1)
    rows, columns = (size // side for size in picture.shape)
    for ax, (title, tiles) in zip(axes[1:], approximations.items()):
        pixels = tiles.view(rows, columns, side, side).transpose(1, 2).reshape(picture.shape)
        image(ax, pixels, title, vmin=0, vmax=1)
    return figure


# ---- 02 ---------------------------------------------------------------------------------------------------------


def coefficients(picture, patch, maps):
    """A picture with one patch framed, and the coefficients of that patch in each head: maps (H, side, side)"""
    figure, axes = panels(1, 1 + len(maps), width=9.2, height=2.4)
    size = len(picture) // maps.shape[1]
    y, x = (size * i - 0.5 for i in divmod(patch, maps.shape[1]))
    image(axes[0], picture, "16 tokens; one framed", vmin=0, vmax=1)
    for line in range(size, len(picture), size):
        axes[0].axhline(line - 0.5, color="0.5", lw=0.6)
        axes[0].axvline(line - 0.5, color="0.5", lw=0.6)
    for h, (ax, weights) in enumerate(zip(axes[1:], maps)):
        image(ax, picture, f"head {h}", cmap="gray_r", vmin=0, vmax=3)
        whole = (-0.5, len(picture) - 0.5, len(picture) - 0.5, -0.5)
        ax.imshow(weights, cmap="Oranges", vmin=0, vmax=0.5, alpha=0.8, extent=whole)
        for i, weight in enumerate(weights.flatten().tolist()):
            row, column = divmod(i, maps.shape[1])
            place = (size * column + size / 2 - 0.5, size * row + size / 2 - 0.5)
            ax.text(*place, f"{100 * weight:.0f}", ha="center", va="center", fontsize=9)
    for ax in axes:
        ax.add_patch(plt.Rectangle((x, y), size, size, fill=False, color=RED, lw=2))
    return figure


def counts(pictures, numbers):
    """How many atoms each patch of a picture takes: {title: (side, side)} over pictures of the same titles"""
    figure, axes = panels(1, len(numbers), width=9.2, height=2.7)
    for ax, (title, values) in zip(axes, numbers.items()):
        picture = pictures[title]
        image(ax, picture, title, vmin=0, vmax=1, alpha=0.5)
        size = len(picture) // len(values)
        for i, value in enumerate(values.flatten().int().tolist()):
            row, column = divmod(i, len(values))
            box = {"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.75}
            place = (size * column + size / 2 - 0.5, size * row + size / 2 - 0.5)
            ax.text(*place, value, ha="center", va="center", bbox=box, color=RED if value == 0 else "black")
    return figure


def mixing(codes):
    """Which of M coefficients are not zero, tokens by atoms: {title: (N, M)}"""
    figure, axes = panels(2, 2, width=9.2, height=3.6)
    for ax, (title, s) in zip(axes.T.flat, codes.items()):
        size = s.abs() / s.abs().max()
        ax.imshow(size.sqrt(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        ax.set_title(title)
        ax.set(xticks=[], yticks=[], xlabel="100 atoms", ylabel="16 tokens")
        ax.spines[:].set_visible(True)
    return figure


# ---- 03 ---------------------------------------------------------------------------------------------------------


def waves(ax, rows, color, gap, title):
    """Functions of time (n, T) one below the other"""
    for level, row in enumerate(rows):
        ax.axhline(-gap * level, color="0.85", lw=0.8)
        ax.plot(row - gap * level, color=color, lw=1.3)
    ax.set(yticks=[], xlabel="time", title=title)
    ax.spines["left"].set_visible(False)


def signal(ax, truth, masked, restored=None, color=ORANGE):
    """A signal (T,) in grey, the samples that are seen as dots, and what was made of them"""
    seen = masked.nonzero()[:, 0]
    ax.plot(truth, color="0.75", lw=4)
    if restored is not None:
        ax.plot(restored, color=color, lw=1.6)
    ax.plot(seen, masked[seen], "o", color="black", markersize=4)
    ax.set(yticks=[], xlabel="time")
    ax.spines["left"].set_visible(False)


def mixture(parts, truth, masked):
    """A signal as the sum of its five bases, parts (5, T)"""
    figure, (left, right) = panels(1, 2)
    waves(left, parts, BLUE, 2.2, "five Fourier bases, each times a number …")
    signal(right, truth, masked)
    right.set_title("… their sum (grey), and the 16 samples seen (dots)")
    return figure


def contributions(runs):
    """{title: parts (9, T)}"""
    figure, axes = panels(1, len(runs), height=4.4, sharey=True)
    for ax, (title, parts), color in zip(axes, runs.items(), (BLUE, RED)):
        waves(ax, parts, color, 1.4, title)
    return figure


def restored(truth, masked, attempts):
    """One signal and what each model makes of it: {title: (T,)}"""
    figure, axes = panels(1, len(attempts), height=3.2, sharey=True)
    for ax, (title, estimate), color in zip(axes, attempts.items(), (RED, GREEN)):
        signal(ax, truth, masked, estimate, color)
        ax.set_title(title)
    return figure


def tuned_atoms(before, nearest, after):
    """Atoms (n, T) over the Fourier bases nearest to them, and the same atoms after tuning"""
    figure, (left, right) = panels(1, 2, height=4.2)
    for level, basis in enumerate(nearest):
        left.plot(basis - 0.6 * level, color="0.8", lw=5)
    waves(left, before, BLUE, 0.6, "after pre-training on the low band")
    waves(right, after, GREEN, 0.6, "the same atoms, tuned on the high band")
    return figure


# ---- 04 ---------------------------------------------------------------------------------------------------------


def flips(rows):
    """One row per digit, {title: pictures (n, H, W)} one column each; a frame around a column that counts"""
    count = len(next(iter(rows.values())))
    figure, axes = panels(count, len(rows), height=8.6 * count / len(rows) + 0.4)
    for column, (title, drawn) in zip(axes.T, rows.items()):
        for i, (ax, picture) in enumerate(zip(column, drawn)):
            image(ax, picture, "" if i else title, vmin=0, vmax=1)
    return figure


def changes(before, after, single, names):
    """A digit before and after, and where each atom makes it brighter (red) or darker (blue): single (n, H, W)"""
    figure = plt.figure(figsize=(8.6, 4.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3))
    top, bottom = left.subplots(2, 1)
    image(top, before, "no atoms", vmin=0, vmax=1)
    image(bottom, after, "the best 12", vmin=0, vmax=1)
    for ax, difference, name in zip(right.subplots(3, 4).flat, single, names):
        image(ax, difference, name, cmap="RdBu_r", vmin=-0.3, vmax=0.3)
        if difference.abs().max() < 0.005:
            ax.text(13.5, 13.5, "not used\nhere", ha="center", va="center", color="0.5")
    right.colorbar(right.axes[0].images[0], ax=right.axes, label="pixel with − without", extend="both", shrink=0.8)
    return figure


def shares(curves, marks):
    """Share of digits flipped by the n best atoms, {label: {n: share}}, and single points {label: (n, share)}"""
    figure, ax = panels(1, 1, height=4.4)
    for (name, curve), color in zip(curves.items(), (BLUE, GREEN, RED)):
        ax.plot(curve.keys(), [100 * share for share in curve.values()], "o-", color=color, markersize=5)
        n = {BLUE: 2, GREEN: 10, RED: 40}[color]
        near = min(curve, key=lambda count: abs(count - n))
        ax.annotate(name, (near, 100 * curve[near]), (8, -14), textcoords="offset points", color=color)
    for name, (n, share) in marks.items():
        ax.plot(n, 100 * share, "D", color="black")
        ax.annotate(name, (n, 100 * share), (8, -4), textcoords="offset points")
    ax.axvline(12, color="0.8", lw=1, zorder=0)
    ax.set_xscale("symlog", linthresh=4)
    decimal_ticks(ax.xaxis, [0, 1, 2, 4, 8, 12, 20, 40, 80, 200])
    ax.set(xlabel="atoms kept, the most important first (of 200)", ylabel="8s that became a 3, %", xlim=(-0.2, 330))
    return figure


# ---- 05 to 07 ---------------------------------------------------------------------------------------------------


def latent(picture, values, decoded):
    """A picture (3, H, W) in [-1, 1], the channels of its latent (4, h, w), and the decoded picture"""
    figure, axes = panels(1, 6, width=10, height=2.2)
    image(axes[0], picture.movedim(0, -1) / 2 + 0.5, "picture")
    for number, (ax, channel) in enumerate(zip(axes[1:], values)):
        image(ax, channel, f"channel {number}")
    image(axes[5], decoded.movedim(0, -1) / 2 + 0.5, "decoded")
    return figure


def picture_rows(rows, titles):
    """{label: pictures}, each row with its label at the left, under titles"""
    columns = len(titles)
    size = 1.75  # inches; a picture takes more than 128 pixels
    wide = 0.9 if any(rows) else 0
    high = size * len(rows) + 0.25 * (1 + max(title.count("\n") for title in titles))
    figure, axes = panels(len(rows), columns, width=size * columns + wide, height=high, squeeze=False)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
    for line, (name, pictures) in zip(axes, rows.items()):
        for ax, picture in zip(line, pictures):
            image(ax, picture, ax.get_title())
        for ax in line[len(pictures) :]:
            ax.set_visible(False)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def word_maps(picture, maps, words):
    """A picture (3, H, W) in [-1, 1], and how much its patches look at each word, (words, h, w), against the mean"""
    grey, edge = picture.mean(dim=0), picture.shape[-1] - 0.5
    lines = -(-(len(words) + 1) // 5)
    figure, axes = panels(lines, 5, width=9.6, height=1.95 * lines)
    image(axes.flat[0], picture.movedim(0, -1) / 2 + 0.5, "the picture")
    for ax in axes.flat[1:]:
        ax.axis("off")
    for ax, word, looks in zip(axes.flat[1:], words, maps):
        image(ax, grey, word.replace("</s>", "(end)"))
        ratio = (looks / looks.mean()).log2()  # (h, w)
        box = (-0.5, edge, edge, -0.5)
        colours = ax.imshow(ratio, cmap="RdBu_r", alpha=0.7, vmin=-2, vmax=2, extent=box, interpolation="nearest")
    bar = figure.colorbar(colours, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=0.7)
    bar.ax.set_yticklabels(["¼", "½", "mean", "2 ×", "4 ×"])
    return figure


def fidelity(points):
    """{method: one (fidelity, edits kept, others right) for each training}"""
    figure, axes = panels(1, 2, height=3.8)
    titles = "edits: how much of the subject is kept", "other captions: share drawn right"
    for ax, title, column in zip(axes, titles, (1, 2)):
        last = [max(each) for each in points.values()]  # of the highest fidelity
        every = [point[column] for each in points.values() for point in each]
        heights = apart([point[column] for point in last], 0.05 * (max(every) - min(every)))
        for (name, each), color, (x, *_), height in zip(points.items(), (ORANGE, BLUE), last, heights):
            ax.plot([point[0] for point in each], [point[column] for point in each], "o", color=color)
            label(ax, x, height, name, color)
        left, right = ax.get_xlim()
        ax.set(xlabel="fidelity: kept with the trained prompt", title=title, xlim=(left, right + 0.35 * (right - left)))
    return figure


# ---- 08 ---------------------------------------------------------------------------------------------------------


def cosines(pictures, captions, values):
    """Pictures in a row, and below each its cosine with every caption, values (pictures, captions)"""
    figure, ax = panels(1, 1, width=9.6, height=4.1)
    for i, picture in enumerate(pictures):
        ax.imshow(picture, extent=(i - 0.46, i + 0.46, -0.35, -1.27))
        for row, value in enumerate(values[i]):
            weight = "bold" if row == i else "normal"
            ax.text(i, 0.45 * row, f"{value:.2f}", ha="center", va="center", weight=weight)
    ax.set(xlim=(-0.5, len(pictures) - 0.5), ylim=(0.45 * len(captions) - 0.2, -1.3), xticks=[])
    ax.set_anchor("E")  # leaves room for the captions
    wrapped = [fill(caption, 34) for caption in captions]
    ax.set_yticks([0.45 * row for row in range(len(captions))], wrapped, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure


def trade(ours, paper):
    """Diversity against fidelity, {dit.study.Setting: (fidelity, diversity)} here and in the paper"""
    figure, axes = panels(1, 2, width=9.6, height=4.6)
    for ax, (title, points) in zip(axes, {"here": ours, "the paper": paper}.items()):
        xs, ys = zip(*points.values())
        heights = apart(ys, 0.06 * (max(ys) - min(ys)))
        right = max(xs) + 0.08 * (max(xs) - min(xs))  # labels stand in a column beside the points
        for (setting, (x, y)), height in zip(points.items(), heights):
            color = BLUE if setting.method == "sparse" else ORANGE
            ax.plot(x, y, "o", color=color)
            line = {"arrowstyle": "-", "color": "0.85", "relpos": (0, 0.5)}  # to the left end of the name
            ax.annotate(str(setting), (x, y), (right, height), color=color, va="center", arrowprops=line)
        left, right = ax.get_xlim()
        ax.set(xlabel="fidelity", title=f"{title} (blue: sparse)", xlim=(left, right + 0.4 * (right - left)))
    axes[0].set_ylabel("diversity")
    return figure


def sweeps(curves):
    """{what is varied: {value: (alignment, fidelity, diversity)}}: a row of plots for each"""
    titles = "alignment (the paper: falls)", "fidelity (the paper: rises)", "diversity (the paper: falls)"
    figure, rows = panels(2, 3, width=9.6, height=5)
    for axes, (varied, points) in zip(rows, curves.items()):
        for ax, title, score in zip(axes, titles, zip(*points.values())):
            ax.plot(list(points), score, "o-", color=BLUE)
            ax.set(xscale="log", xlabel=varied, title=title)
            decimal_ticks(ax.xaxis, list(points))
    return figure


# ---- 09 ---------------------------------------------------------------------------------------------------------


def additivity(missed):
    """Error of Eq. 11 for layers of degree 1, 2, …: {kind of atoms: (degrees,)}"""
    figure, ax = panels(1, 1, height=3.8)
    for (name, errors), color, up in zip(missed.items(), (BLUE, GREEN, ORANGE), (10, 10, -16)):
        ax.plot(range(1, len(errors) + 1), [max(error, 1e-17) for error in errors], "o-", color=color)
        ax.annotate(name, (3.5, errors[2]), (0, up), textcoords="offset points", color=color, ha="center")
    ax.axhspan(1e-17, 1e-14, color="0.93")
    ax.text(6, 2e-15, "rounding", color="0.5", ha="right")
    ax.set(yscale="log", xlabel="degree K of the layer", ylabel="error of Eq. 11", ylim=(1e-17, 30))
    return figure


def by_block(additive, linear):
    """Errors of Eq. 11 and of the first order for each block, {variant: (blocks,)}"""
    figure, axes = panels(1, 2, height=3.8)
    titles = "error of Eq. 11: 16 atoms\ntogether and one by one", "error of the first order:\na single atom taken out"
    for ax, title, errors in zip(axes, titles, (additive, linear)):
        curves = {name: 100 * error for name, error in errors.items()}
        last, top = len(next(iter(curves.values()))) - 1, max(curve.max().item() for curve in curves.values())
        heights = apart([curve[-1].item() for curve in curves.values()], 0.07 * top)
        for (name, curve), height, color in zip(curves.items(), heights, (BLUE, GREEN, ORANGE)):
            ax.plot(curve, "o-", color=color)
            label(ax, last, height, name, color)
        ax.set(xlabel="block of the atoms", title=title, ylim=(0, 1.05 * top), xlim=(-0.3, last + 2.2))
        ax.set_xticks(range(last + 1))
    axes[0].set_ylabel("% of the effect")
    return figure


def depth(picture, changes):
    """A picture (3, H, W) in [-1, 1], and what each block changes in it, (3, H, W) each, in one colour scale"""
    columns = (len(changes) + 2) // 2
    figure, axes = panels(2, columns, height=4.4)
    figure.get_layout_engine().set(h_pad=0.12)  # inches; else the titles are cut off
    reach = torch.stack(changes).mean(1).abs().quantile(0.999).item()
    image(axes[0, 0], picture.movedim(0, -1) / 2 + 0.5, "with all atoms")
    axes[1, 0].axis("off")
    for block, change in enumerate(changes):
        ax = axes[block // (columns - 1), 1 + block % (columns - 1)]
        image(ax, change.mean(0), f"block {block}", cmap="RdBu_r", vmin=-reach, vmax=reach)
    bar = figure.colorbar(axes[0, 1].images[0], ax=axes[1, 0], location="bottom", shrink=0.9, extend="both")
    bar.set_ticks([-reach, 0, reach], labels=[f"−{reach:.1f}", "0", f"{reach:.1f}"])
    bar.set_label("with − without")
    return figure
