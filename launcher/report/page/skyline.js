"use strict";
// The peaks of a plan at any micro batch, length and memory, from the rows that the planner embedded in this page.
// All numbers are whole and below 2^53 (the planner refused to embed others), so products and sums are exact.

/** Sum of products of two lists. */
function dot(sizes, factors) {
  let sum = 0;
  for (let i = 0; i < sizes.length; i += 1) sum += sizes[i] * factors[i];
  return sum;
}

/** What is missing to the next multiple of a tile, or (for a negative tile) whether anything is; 1 for no tile. */
function step(tile, length) {
  if (tile === 0) return 1;
  const size = Math.abs(tile);
  const missing = (size - length % size) % size;
  return tile > 0 ? missing : Math.sign(missing);
}

/** Whether a shape lies within the bounds of a regime; null is no bound. */
function contains(bounds, batch, length) {
  const tokens = batch * (length - bounds.unseen);
  const within = (low, value, high) => low <= value && (high === null || value <= high);
  return within(bounds.batch_min, batch, bounds.batch_max)
    && within(bounds.length_min, length, bounds.length_max)
    && within(bounds.tokens_min, tokens, bounds.tokens_max);
}

/** The first of some regimes or gaps that a shape lies in; undefined when there is none. */
function holding(regimes, batch, length, steps) {
  return regimes.find((regime) => regime.traced_accumulation === Math.min(steps, 2)
    && contains(regime.bounds, batch, length));
}

/** The highest moment of every phase: {phase, bytes, parts}, parts in the order of the categories. */
function peaks(surface, inputs, batch, length, more) {
  const monomials = surface.exponents.map(([i, j, tile]) => batch ** i * length ** j * step(tile, length));
  const waiting = more * dot(surface.waiting, monomials);
  return surface.phases.map(({ phase, rows }) => {
    let highest = null;
    for (const row of rows) {
      const parts = row.map((sizes) => dot(sizes, monomials));
      const bytes = parts.reduce((sum, part) => sum + part, 0);
      if (highest === null || bytes > highest.bytes) highest = { phase, bytes, parts };
    }
    highest.parts[inputs] += waiting; // micro batches that wait for their turn
    highest.bytes += waiting;
    return highest;
  });
}

/** The highest of some peaks, the earliest of equals. */
function highest(found) {
  return found.reduce((best, peak) => (peak.bytes > best.bytes ? peak : best));
}

/**
 * Memory of the plan at a micro batch (with its accumulation) and a length.
 * Returns {phases, peak, device, host}, bytes; or {gap}, the reason why this page can't say.
 */
function price(model, split, length) {
  const { batch, steps } = split;
  const regime = holding(model.regimes, batch, length, steps);
  if (regime === undefined) {
    const gap = holding(model.gaps, batch, length, steps);
    return { gap: gap === undefined ? "no regime in this page holds this shape" : gap.reason };
  }
  const inputs = model.categories.indexOf("inputs");
  const more = steps - regime.traced_accumulation;
  const phases = peaks(regime.device, inputs, batch, length, more);
  const peak = highest(phases);
  const onHost = regime.host === null ? [] : peaks(regime.host, inputs, batch, length, more);
  const host = regime.process_bytes + (onHost.length ? highest(onHost).bytes : 0);
  return { phases, peak, device: peak.bytes + model.context_bytes, host };
}

/** The nearest whole number, of two equally near the even one: as Python's `round`. */
function roundHalfEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  if (rest !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/** What a plan may take of a memory: all but the headroom. */
function budget(model, memory) {
  return memory - roundHalfEven(model.headroom * memory);
}

/** Bytes by which a price exceeds the device or its host; 0 or less: it fits. */
function shortBy(model, found, memory) {
  const onDevice = found.device - budget(model, memory);
  const onHost = model.host_memory_bytes ? found.host - model.host_memory_bytes : -Infinity;
  return { bytes: Math.max(onDevice, onHost), where: onHost > onDevice ? "host memory" : "the card" };
}
