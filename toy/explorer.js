"use strict";
// The maths of explore.html: section 3 of TDD (arXiv 2409.01347) once more, to be read beside
// tdd.py and solvers.py. Points are x, y in turn in a Float32Array, the schedule is in doubles. A
// function* may pause where it yields, so that long work does not block the page.

// --------------------------------------------------------------- what toy/explorer.py hands over
const run = JSON.parse(document.getElementById("run").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
const floats = (text) => new Float32Array(bytes(text));
const { T, N, kmin, kmax } = run;
const logAlpha = new Float64Array(bytes(run.log_alpha));
const noise = floats(run.noise); // x_T of all samples, then a z of each step
const endpoints = floats(run.endpoints); // where the teacher's ODE takes each x_T
const samples = run.label.length;
const teacher = run.methods[0];
for (const layer of run.methods.flatMap((method) => method.layers)) {
  layer.weight = floats(layer.weight); // (out, in)
  layer.bias = floats(layer.bias);
}

// ------------------------------------------------------------------------------ noise schedule
const CLEAN = -1; // alpha = 1, sigma = 0; timestep 0 still holds sigma_0
const grid = Array.from({ length: N + 1 }, (_, n) => (n === 0 ? 0 : (n * T) / N - 1)); // t_0..t_N

// alpha_t, sigma_t and lambda_t = log(alpha_t / sigma_t)
function at(t) {
  const log_alpha = logAlpha[t + 1], sigma = Math.sqrt(-Math.expm1(2 * log_alpha));
  return { alpha: Math.exp(log_alpha), sigma, lam: log_alpha - Math.log(sigma) };
}

// a x + b y
const mix = (a, x, b, y) => x.map((x_i, i) => a * x_i + b * y[i]);

// ------------------------------------------------------------------------------------- network
//
// eps(x_t, t, c) = sigma_t x_t + MLP. The null condition has no labels. s, where a network takes
// it, is TCF(S+)'s target time or the number of steps K that is told.
function network({ layers }, x_t, t, labels, s) {
  const rows = x_t.length / 2;
  const sinusoids_s = s === undefined ? [] : sinusoids(s), sinusoids_t = sinusoids(t);
  const input_of_label = [0, 1, 2, 3, "null"].map((label) => {
    const one_hot = [0, 1, 2, 3].map((c) => Number(c === label));
    return [...sinusoids_t, ...one_hot, ...sinusoids_s];
  });
  const width = 2 + input_of_label[0].length, input = new Float32Array(rows * width);
  for (let row = 0; row < rows; row++) {
    input.set(x_t.subarray(2 * row, 2 * row + 2), row * width);
    input.set(input_of_label[labels ? labels[row] : 4], row * width + 2);
  }
  const h = layers.reduce((h, layer, i) => linear(layer, i === 0 ? h : silu(h), rows), input);
  return mix(at(t).sigma, x_t, 1, h);
}

const silu = (h) => h.map((x) => x / (1 + Math.exp(-x)));

// cosines, then sines, of 10000^(-i/16) t, in single precision as in unet.timestep_embedding
function sinusoids(t) {
  const phases = Array.from({ length: 16 }, (_, i) => {
    const frequency = Math.exp(Math.fround(-Math.log(10000) * i) / 16);
    return Math.fround(t * Math.fround(frequency));
  });
  return [...phases.map(Math.cos), ...phases.map(Math.sin)];
}

// A layer, of four rows at once: the weights are read once for them, which is twice as fast.
function linear({ weight, bias }, x, rows) {
  const outs = bias.length, ins = weight.length / outs, y = new Float32Array(rows * outs);
  for (let row = 0; row < rows; row += 4) {
    for (let o = 0; o < outs; o++) {
      let a = bias[o], b = a, c = a, d = a;
      for (let i = 0, j = row * ins; i < ins; i++, j++) {
        const w = weight[o * ins + i];
        a += w * x[j];
        b += w * x[j + ins];
        c += w * x[j + 2 * ins];
        d += w * x[j + 3 * ins];
      }
      [a, b, c, d].forEach((sum, i) => (y[(row + i) * outs + o] = sum));
    }
  }
  return y;
}

// ------------------------------------------------------------- 3.2 target timestep selection
//
// What a start t_{n+1} may aim at, ascending: pairs of tau and, for next stops, their K.
function targets({ Ks, kmin, kmax, e }, n) {
  const snap = (m, k) => grid[Math.ceil((m * N) / k)]; // mT/k, on the grid as samplers visit it
  if (Ks) return Ks.map((K) => [snap(Math.floor((n * K) / N), K), K]); // Eq. 4, for each K
  const t = (n * T) / N, admitted = new Map();
  for (let k = kmin; k <= kmax; k++) { // Eq. 5
    for (let m = 0; m < k; m++) {
      const tau = (m * T) / k;
      if (t - e <= tau + 1e-9 && tau <= t + 1e-9) admitted.set(m / k, snap(m, k)); // Eq. 7
    }
  }
  return [...admitted].sort(([a], [b]) => a - b).map(([, tau]) => [tau]);
}

// ---------------------------------------------------------------------- 3.3 decoupled guidance

// Eq. 12: eps = (1 + w) eps(x_t, t, c) - w eps(x_t, t)
const guided = (net, labels, w) => (x_t, t, s) => {
  const eps_c = network(net, x_t, t, labels, s);
  return w === 0 ? eps_c : mix(1 + w, eps_c, -w, network(net, x_t, t, null, s));
};

// Eq. 13: the w at which a student distilled at w' acts as the teacher does at w
const tuned = (w, w_distilled) => (1 + w) / (1 + w_distilled) - 1;

// -------------------------------------------------------------------------------- 3.4 sampling
//
// a and b are `at` of the timesteps that a step leads from and to; h = lambda_b - lambda_a.

// Eq. 15: x_s = alpha_s/alpha_t x_t - sigma_s (e^h - 1) eps, where sigma_s (e^h - 1) is computed as
// alpha_s (e^-lambda_t - e^-lambda_s), which is finite at s = CLEAN
const eq_15 = (x_t, eps, a, b) =>
  mix(b.alpha / a.alpha, x_t, -b.alpha * (Math.exp(-a.lam) - Math.exp(-b.lam)), eps);

// Eq. 16: x_s = sigma_s/sigma_t x_t - alpha_s (e^-h - 1) x_0
const eq_16 = (x_t, x_0, a, b) =>
  mix(b.sigma / a.sigma, x_t, -b.alpha * Math.expm1(a.lam - b.lam), x_0);

const x0_from_eps = (x_t, eps, a) => mix(1 / a.alpha, x_t, -a.sigma / a.alpha, eps);

// C above Eq. 17, whose s is 1 as published: a clamp, here to the square that holds the data
const clip = (x_0) => x_0.map((x) => Math.min(Math.max(x, -run.bound), run.bound));

// f of Eq. 6, a jump from t to s by one evaluation: Eq. 15 or, with clipping, Eq. 17
function jump(eps_t, x_t, t, s, clipped) {
  const a = at(t), b = at(s);
  return clipped ? eq_16(x_t, clip(x0_from_eps(x_t, eps_t, a)), a, b) : eq_15(x_t, eps_t, a, b);
}

// Eq. 18: x_p = alpha_p/alpha_s x_s + sqrt(1 - alpha_p^2/alpha_s^2) z
function renoise(x_s, s, p, z) {
  const ratio = at(p).alpha / at(s).alpha;
  return mix(ratio, x_s, Math.sqrt(1 - ratio ** 2), z);
}

// A.2: every N/k-th point of the grid; or the kmin-step schedule with k - kmin of the kmax-step
// one's timesteps, the noisiest first
const equidistant = (k) => Array.from({ length: k }, (_, i) => grid[N - Math.floor((i * N) / k)]);
function nonequidistant(k) {
  const coarse = equidistant(kmin);
  const others = equidistant(kmax).filter((t) => !coarse.includes(t));
  return [...coarse, ...others.slice(0, k - kmin)].sort((a, b) => b - a);
}

// s = (1 - gamma) p
const landing = (p, gamma) => (p === CLEAN ? CLEAN : Math.floor((1 - gamma) * p + 1e-6));

// The gamma-sampler: f from t down to s, then Eq. 18 up to p, the next stop. Returns x_T and then,
// for each step, x_s and x_p.
function* gammaSample(f, timesteps, gamma, rows, clip_steps) {
  const draw = (i) => noise.subarray(2 * samples * i, 2 * (samples * i + rows));
  const path = [draw(0)];
  for (const [i, t] of timesteps.entries()) {
    const p = timesteps[i + 1] ?? CLEAN, s = landing(p, gamma);
    const x_s = yield* f(path.at(-1), t, s, i < clip_steps);
    path.push(x_s, s < p ? renoise(x_s, s, p, draw(i + 1)) : x_s);
    yield;
  }
  return path;
}

// ---------------------------------------------------------------- a case, and how far off it is
//
// A case c has k, gamma, w, tune (is w the teacher's, Eq. 13?), clip_steps, uneven (is the schedule
// non-equidistant?) and K, which is told: 0 for k.

const timesteps = (c) =>
  c.uneven && kmin <= c.k && c.k <= kmax ? nonequidistant(c.k) : equidistant(c.k);

// The w of Eq. 12 to sample with; the teacher's is the w' that students distil.
function guidance(method, c) {
  if (method === teacher) return run.w_distilled;
  return c.tune ? tuned(c.w, run.w_distilled) : c.w;
}

// What a student that takes K is told: the nearest that it knows, of two the lower
function numSteps({ Ks }, c) {
  const K = c.K || c.k;
  return Ks.reduce((best, other) => (Math.abs(other - K) < Math.abs(best - K) ? other : best));
}

// What a case costs, and what its network is told, in words
function describe(method, c) {
  return `passes: ${c.k * (guidance(method, c) === 0 ? 1 : 2)}` +
    (method === teacher ? `, guided by the students' w' = ${run.w_distilled}` : "") +
    (method.Ks.length ? `, told K = ${numSteps(method, c)}` : "");
}

// The path of the first rows samples, as from gammaSample
function* sample(method, c, rows) {
  const eps = guided(method, run.label, guidance(method, c));
  const scalar = { target_time: (s) => Math.max(s, 0), num_steps: () => numSteps(method, c) };
  function* f(x_t, t, s, clipped) {
    return jump(eps(x_t, t, scalar[method.scalar]?.(s)), x_t, t, s, clipped);
  }
  return yield* gammaSample(f, timesteps(c), c.gamma, rows, c.clip_steps);
}

// The teacher's ODE from t to s in small steps: DPM-Solver++(2M), which is Eq. 16 with an x_0 that
// is extrapolated in lambda
function* exact(eps, x_t, t, s) {
  const stops = [t, ...run.fine.filter((u) => s < u && u < t), s];
  let last_x_0, last_h;
  for (let i = 0; i + 1 < stops.length; i++) {
    const a = at(stops[i]), b = at(stops[i + 1]), h = b.lam - a.lam;
    const x_0 = x0_from_eps(x_t, eps(x_t, stops[i]), a);
    const slope = i === 0 || h === Infinity ? 0 : h / (2 * last_h);
    x_t = eq_16(x_t, slope === 0 ? x_0 : mix(1 + slope, x_0, -slope, last_x_0), a, b);
    [last_x_0, last_h] = [x_0, h];
    yield;
  }
  return x_t;
}

// What a perfect student would give: the same noise, but every jump exact, at w the guided
// (1 + w) Phi(w') - w Phi(null)
const references = new Map();
function* reference(c, w, rows) {
  if (c.gamma === 0 && w === 0) return endpoints.subarray(0, 2 * rows);
  const key = [timesteps(c), c.gamma, w, rows].join(" ");
  if (references.has(key)) return references.get(key);
  const conditional = guided(teacher, run.label, run.w_distilled);
  const unconditional = guided(teacher, null, 0);
  function* f(x_t, t, s) {
    const x_s = yield* exact(conditional, x_t, t, s);
    return w === 0 ? x_s : mix(1 + w, x_s, -w, yield* exact(unconditional, x_t, t, s));
  }
  references.set(key, (yield* gammaSample(f, timesteps(c), c.gamma, rows, 0)).at(-1));
  return references.get(key);
}

// The w that guides a method beyond what it distilled
const addedGuidance = (method, c) => (method === teacher ? 0 : guidance(method, c));

// Root mean squared distance of the first rows samples to their references; known ones are kept.
const errors = new Map();
const keyOf = (method, c, rows) => [method.key, ...Object.values(c), rows].join(" ");
function* rmse(method, c, rows) {
  const key = keyOf(method, c, rows);
  if (errors.has(key)) return errors.get(key);
  const x = (yield* sample(method, c, rows)).at(-1);
  const y = yield* reference(c, addedGuidance(method, c), rows);
  const square = x.reduce((sum, x_i, i) => sum + (x_i - y[i]) ** 2, 0);
  errors.set(key, Math.sqrt(square / rows));
  return errors.get(key);
}

// The chart's rmse is of fewer samples where exact jumps have to be computed.
const FEWER = Math.min(96, samples);
const chartRows = (method, c) =>
  c.gamma === 0 && addedGuidance(method, c) === 0 ? samples : FEWER;
const knownError = (method, c) => errors.get(keyOf(method, c, chartRows(method, c)));

// ----------------------------------------------------------------------------------- long work

// What work returns, without a pause
function drain(work) {
  for (;;) {
    const { done, value } = work.next();
    if (done) return value;
  }
}

// The same in slices of 12 ms, between which the page can answer; undefined once it is not wanted
async function finish(work, wanted) {
  while (wanted()) {
    for (const start = performance.now(); performance.now() < start + 12; ) {
      const { done, value } = work.next();
      if (done) return value;
    }
    await new Promise((resume) => setTimeout(resume));
  }
}
