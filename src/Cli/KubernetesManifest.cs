// A manifest for Kubernetes: an indexed job of a pod for each node, a headless service that names the pods, and a claim of a shared volume.

using System.Globalization;
using System.Text.Json;

namespace DeepSeekGraph.Cli;

internal static class KubernetesManifest
{
    /// Where pods have the shared volume.
    public const string Volume = "/work";

    private const int Port = 29500;

    /// Every value is a JSON string, which YAML reads as it is: nothing in a name or path can be more than a value.
    public static string Of(Submission job)
    {
        var name = Quoted(Submission.Label("--name", job.Name));
        var gpus = job.GpusPerNode is { } count ? $"\n              nvidia.com/gpu: {Quoted(Text(count))}" : "";
        var cpus = job.CpusPerRank is { } each ? $"\n              cpu: {Quoted(Text(each * job.PerNode))}" : "";
        string[] command =
        [
            job.Program, "launch", "--nproc", Text(job.PerNode), "--nnodes", Text(job.Nodes), "--node-rank", "$(DSG_NODE)",
            "--master-addr", $"{job.Name}-0.{job.Name}", "--master-port", Text(Port),
            "--", .. ((string[])["run", job.Plan, .. job.Options]).Select(Literal),
        ];
        return $"""
            # plan {job.Hash}: {job.Ranks} ranks, {job.PerNode} in each of {job.Nodes} pods
            # Before: copy the plan, and dsg's folder if the image has none, to the volume, which pods have at {Volume}.
            apiVersion: v1
            kind: PersistentVolumeClaim
            metadata:
              name: {Quoted(Submission.Label("--claim", job.Claim))}
            spec:
              accessModes: ["ReadWriteMany"]
              resources:
                requests:
                  storage: "100Gi"
            ---
            apiVersion: v1
            kind: Service
            metadata:
              name: {name}
            spec:
              clusterIP: None
              # pods find rank 0 before they are ready
              publishNotReadyAddresses: true
              selector:
                batch.kubernetes.io/job-name: {name}
              ports:
                - name: "rendezvous"
                  port: {Port}
            ---
            apiVersion: batch/v1
            kind: Job
            metadata:
              name: {name}
            spec:
              completionMode: Indexed
              completions: {job.Nodes}
              parallelism: {job.Nodes}
              # a pod that fails ends the job: its ranks would come back alone
              backoffLimit: 0
              template:
                spec:
                  restartPolicy: Never
                  subdomain: {name}
                  containers:
                    - name: "dsg"
                      image: {Quoted(job.Image)}
                      workingDir: "{Volume}"
                      command: [{string.Join(", ", command.Select(Quoted))}]
                      env:
                        - name: DSG_NODE
                          valueFrom:
                            fieldRef:
                              fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
                        # all pods of this job know it, and nobody without access to it
                        - name: DSG_JOB_TOKEN
                          valueFrom:
                            fieldRef:
                              fieldPath: metadata.labels['batch.kubernetes.io/controller-uid']
                      resources:
                        limits:
                          memory: {Quoted($"{Text(job.MebibytesPerNode)}Mi")}{cpus}{gpus}
                      volumeMounts:
                        - name: "work"
                          mountPath: "{Volume}"
                  volumes:
                    - name: "work"
                      persistentVolumeClaim:
                        claimName: {Quoted(job.Claim)}

            """.Replace("\r\n", "\n", StringComparison.Ordinal);
    }

    private static string Quoted(string value) => JsonSerializer.Serialize(value);

    /// What Kubernetes must not take for one of its own variables.
    private static string Literal(string word) => word.Replace("$(", "$$(", StringComparison.Ordinal);

    private static string Text(long number) => number.ToString(CultureInfo.InvariantCulture);
}
