// Twin of `moments` in src/rules/common.rs: `m ← β₁·m + (1 − β₁)·g`, `v ← β₂·v + (1 − β₂)·g²`.

fn moments(
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    g: vec4<f32>,
    m: ptr<function, vec4<f32>>,
    v: ptr<function, vec4<f32>>,
) {
    *m = lerp(*m, g, one_minus_beta1);
    *v = *v * beta2 + (one_minus_beta2 * g) * g;
}
