// Arithmetic of the charts: ticks, smoothing, the nearest step.

function ticks(low, high, count) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((each) => each * power >= raw) * power;
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}
function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const unit of high / low > 50 ? [1] : [1, 2, 5]) {
      const at = unit * 10 ** power;
      if (at >= low * 0.999 && at <= high * 1.001) found.push(at);
    }
  }
  return found;
}
function tickText(value) {
  const size = Math.abs(value);
  if (size >= 10000) return +(value / 1000).toPrecision(4) + 'k';
  return String(+value.toPrecision(3));
}
/** Exponential moving average that does not start from zero; gaps stay gaps. */
function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0, share = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return sum / share;
  });
}
function nearest(x, step) {
  let low = 0, high = x.length - 1;
  while (low < high) { const middle = (low + high) >> 1; if (x[middle] < step) low = middle + 1; else high = middle; }
  return low > 0 && step - x[low - 1] < x[low] - step ? low - 1 : low;
}
