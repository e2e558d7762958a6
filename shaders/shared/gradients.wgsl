// One pass over gradients on the device; the function `change` of one vec4 and the bindings are generated: see
// src/shader.rs.
@compute @workgroup_size(WORKGROUP)
fn each_chunk(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) grid: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = workgroup.x + workgroup.y * grid.x;
    if (index >= arrayLength(&table.chunks)) {
        return;
    }
    let chunk = table.chunks[index];
    for (var i = lane; 4u * i < chunk.len; i += WORKGROUP) {
        change(chunk, i);
    }
}
